"""Sphinx configuration: ``sphinx-build -W docs docs/_build``."""

import sktransfer

project = "sktransfer"
copyright = "The sktransfer developers"
release = version = sktransfer.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
]
intersphinx_mapping = {
    "python": ("https://docs.python.org/3", None),
    "sklearn": ("https://scikit-learn.org/stable", None),
    "torch": ("https://docs.pytorch.org/docs/stable", None),
}
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
numpydoc_show_class_members = False
autosummary_generate = True
exclude_patterns = ["_build", "builtin/*.txt"]
html_theme = "alabaster"
