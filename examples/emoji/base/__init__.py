"""The parts of train_base.py.

Shape letters: N images, B batch, V variants of an image, C latent channels, H W height and width, S tokens.
"""
