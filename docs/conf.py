"""Sphinx configuration. Build the site, without a network connection, with

    sphinx-build -W docs docs/_build/html

``-D plot_gallery=0`` shows the examples without running them.
"""

import urllib.request
import warnings
from pathlib import Path

import sktransfer

project = "sktransfer"
author = copyright = "The sktransfer developers"
release = version = sktransfer.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.extlinks",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "builtin", "benchmarks/results"]
templates_path = ["_templates"]


def is_reachable(url):
    try:
        with urllib.request.urlopen(f"{url}/objects.inv", timeout=5):
            return True
    except OSError:
        return False


# An index that cannot be fetched would be a warning, and so an error without a network.
others = {
    "python": "https://docs.python.org/3",
    "sklearn": "https://scikit-learn.org/stable",
    "torch": "https://docs.pytorch.org/docs/stable",
    "pandas": "https://pandas.pydata.org/docs",
}
intersphinx_mapping = {name: (url, None) for name, url in others.items() if is_reachable(url)}
suppress_warnings = ["config.cache"]  # the gallery's configuration holds a function
extlinks = {"doi": ("https://doi.org/%s", "doi:%s")}
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
numpydoc_show_class_members = False
autosummary_generate = True
toc_object_entries_show_parents = "hide"
autodoc_member_order = "groupwise"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": r"/(plot_|quickstart)",
    "ignore_pattern": r"__init__|/serve/|parquet_to_embeddings",
    "within_subsection_order": "FileNameSortKey",
    "show_memory": False,
    "write_computation_times": False,
    "remove_config_comments": True,
    "doc_module": ("sktransfer",),
    "backreferences_dir": "gallery/backreferences",
    "abort_on_example_error": True,
    "default_thumb_file": str(Path(__file__).parent / "quickstart.png"),
}
warnings.filterwarnings("ignore", message=".*FigureCanvasAgg is non-interactive")

html_theme = "pydata_sphinx_theme"
html_title = "sktransfer"
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "logo": {"image_light": "_static/favicon.svg", "image_dark": "_static/favicon.svg"}
    | {"text": f"sktransfer {release}"},
    "github_url": "https://github.com/sktransfer/sktransfer",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "show_prev_next": True,
    "secondary_sidebar_items": ["page-toc"],
    "footer_start": ["copyright"],
    "footer_end": [],
}
html_sidebars = {name: [] for name in ("index", "changelog", "coming_from", "by_the_book")}

# A heading goes before each of these parameters of the long classes.
GROUPS = {
    "backbone": "The network",
    "preprocessing": "The images",
    "unfreeze": "What is trained",
    "loss": "How it is trained",
    "weight_decay": "Against overfitting",
    "class_weight": "Classes, chance and callbacks",
    "batch_size": "Speed and memory",
    "device": "The machine",
    "on_error": "Bad images and progress",
}
LONG = ("FineTuningClassifier", "FineTuningRegressor", "PretrainedFeatureExtractor")


def group_parameters(app, what, name, obj, options, lines):
    """Insert headings into the list of parameters that numpydoc has written."""
    if what != "class" or not name.endswith(LONG):
        return
    groups = dict(GROUPS)
    if "FineTuning" in name:
        del groups["batch_size"]  # one of those that say how it is trained
    else:
        del groups["device"]
    grouped = []
    for line in lines:
        if line.startswith(":Attributes:"):
            groups = {}
        parameter = line.strip().removeprefix("**").split("**")[0]
        if line.startswith("    **") and parameter in groups:
            grouped += [f"    .. rubric:: {groups.pop(parameter)}", ""]
        grouped.append(line)
    lines[:] = grouped


def close_code(app, docname, source):
    """Remove the empty line that doctest needs at the end of a block of code."""
    source[0] = source[0].replace("\n\n```\n", "\n```\n")


def setup(app):
    app.connect("source-read", close_code)
    app.connect("autodoc-process-docstring", group_parameters, priority=900)
