"""How the testbed's three models were trained: recipe, texts, optimizer, model cards. Not part of the package.

python -m dev.testbed_training.train --family llama, from the root of the checkout
"""
