"""Settings of the documentation, for `sphinx-build -W -n -b html docs OUT` and for `-b man`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent / "_extension"), str(Path(__file__).parent.parent)]

from cachedb_docs import man_pages_of  # noqa: E402

from cachedb import __version__  # noqa: E402

project = "cachedb"
author = "the cachedb authors"
copyright = f"{author}; Apache License 2.0"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "cachedb_docs"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_extension"]
nitpicky = True
# Types of Python and of libraries have no page here, and the build fetches no other site.
nitpick_ignore_regex = [("py:.*", r"(?!cachedb\.).*"), ("py:class", r"cachedb\.\w+\..*")]

myst_enable_extensions = ["deflist"]
smartquotes = False  # keep the two hyphens of `--link`
myst_heading_anchors = 3
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"  # users get objects from methods, and do not call the classes
python_use_unqualified_type_names = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"cachedb {version}"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"top_of_page_buttons": []}

man_pages = man_pages_of(author)
