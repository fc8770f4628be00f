"""The half that runs inside the training process."""
