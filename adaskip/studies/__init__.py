"""Tables, figures and studies; only the command line and the scripts import them."""
