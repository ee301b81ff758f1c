"""The `qlora-native` command. transformers, safetensors and tqdm are needed here alone."""
