"""`report.html`: a run's outcome on one page that opens from disk, without a server and without a network.

`document` gathers what the page shows as one plain value, `render` makes the file of it; `assets/` holds the page
itself: a template, a style sheet and scripts.
"""
