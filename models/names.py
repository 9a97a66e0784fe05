"""The names of the files that a run keeps for inference; no torch here, since Ray's controller
imports them."""

CONFIG_NAME = "config.json"
MODEL_NAME, EMA_NAME = "model.safetensors", "ema.safetensors"  # as trained; averaged
FINAL_NAME = "final.json"  # written last by a run that reached its last step
