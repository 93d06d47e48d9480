"""Pictures and the HTML page of what a search found.

Import from `page` and `figures`.
"""
