"""Object detection with CondConv: models, data, training, evaluation and visualization."""
