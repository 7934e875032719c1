"""Starting runs elsewhere, and keeping them going. Needs nothing but Python's own library."""
