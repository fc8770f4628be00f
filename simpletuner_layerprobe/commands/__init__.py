"""One command of `layerprobe` per module; cli.py names them."""
