"""Pictures and HTML pages of what a search found and what training made of it.

Import from `page`, `figures` and `style`, the look that all drawings share; `templates` is private.
"""
