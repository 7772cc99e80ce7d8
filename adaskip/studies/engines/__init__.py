"""Times exported models in the engines that serve them, each in its own process and Python environment.

`bench` treats an engine as one more mode of decoding. `engines` lists them, `processes` starts them, `worker` is what
runs there; the modules below it import nothing that their environment might lack.
"""
