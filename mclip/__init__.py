"""mclip: distil CLIP into a model that fits a phone.

The package is a set of plain modules, one idea each; the notebooks in ``notebooks/`` introduce them in order.
"""

__version__ = "0.1.0"
