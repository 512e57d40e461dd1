"""From the `results` of a run (the content of report.json) to a verdict, a console table and one HTML page.

    results.py     reading `results`, of which any part may be missing
    formats.py     numbers as people read them, with units
    verdict.py     which file to ship, and whether QAT was worth it
    comparison.py  the rows of the table that puts float, PTQ and QAT side by side
    console.py     the terminal
    charts.py      inline SVG: accuracy, cost, training
    layer_charts.py  the same of what is inside the files: noise, ranges, histograms, operators
    graph.py       the graph of the integer file
    islands.py     what stays in float, and what it costs
    page.py        the page, from report.html.j2
    runs.py        several runs, with seeds of one recipe together
    model_card.py  the model card, from model_card.md.j2
    node_data.py   noise and parity for Model Explorer
    folder.py      all of these files of one run

Nothing here imports Keras, TensorFlow or NumPy; matplotlib is imported when a chart is drawn.
"""

from mobileqat.report.console import console_summary
from mobileqat.report.folder import write_report
from mobileqat.report.page import render_html, write_comparison, write_html
from mobileqat.report.runs import compare, console_comparison
from mobileqat.report.verdict import decide

__all__ = [
    "compare",
    "console_comparison",
    "console_summary",
    "decide",
    "render_html",
    "write_comparison",
    "write_html",
    "write_report",
]
