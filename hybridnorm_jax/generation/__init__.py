"""Text from a model, token by token. How well a model predicts given text is evaluation's."""
