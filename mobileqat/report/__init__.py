"""From the `results` of a run (the content of report.json) to a verdict, a console table and one HTML page.

    results.py     reading `results`, of which any part may be missing
    formats.py     numbers as people read them, with units
    verdict.py     which file to ship, and whether QAT was worth it
    comparison.py  the rows of the table that puts float, PTQ and QAT side by side
    console.py     the terminal
    charts.py      inline SVG
    page.py        the page, from report.html.j2

Nothing here imports Keras, TensorFlow or NumPy; matplotlib is imported when a chart is drawn.
"""

from mobileqat.report.console import console_summary
from mobileqat.report.page import render_html, write_html
from mobileqat.report.verdict import decide

__all__ = ["console_summary", "decide", "render_html", "write_html"]
