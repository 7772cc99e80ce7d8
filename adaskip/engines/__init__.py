"""What leaves the process: checkpoints of skipped models that transformers, vLLM and llama.cpp load; a file an engine.

`fold` says which sublayers a plan leaves and by how much their outputs are divided, `families` which tensors that
concerns, `shards` rewrites a checkpoint one weight file at a time, `registry` names the engines.
"""
