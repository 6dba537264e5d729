"""What a conversion measured, as one page to look at: figures, the numbers behind each, nothing computed twice.

``evidence``   what is on disk about conversions: checkpoints, results of a sweep, of a study of nodes
``figures``    each figure as a table of numbers and a way to draw it
``drawing``    pictures of figures, for a file and for a page that may be light or dark
``page``       the page
"""
