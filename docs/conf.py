"""Settings of the documentation: `make docs` builds it with Sphinx, MyST and the Furo theme, warnings as errors."""

from importlib.metadata import version as version_of

project = "perceiver"
author = "the perceiver authors"
version = release = version_of("perceiver-cli")
html_title = f"perceiver {release}"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_show_copyright = False
html_show_sphinx = False
myst_heading_anchors = 3
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
nitpicky = False
