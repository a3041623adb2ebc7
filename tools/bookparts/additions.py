"""What a staged chapter gets that its source has not: its box, and the line that leads to the reference."""

import nbformat

from bookparts import api, reproduce


def add_parts(chapter: str, notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The staged notebook, executed or not, with its additions; they are no part of what is executed."""
    if box := reproduce.box_for(chapter):
        notebook.cells.insert(1, nbformat.v4.new_markdown_cell(box, id="reproduce"))
    if line := api.api_line(chapter):
        notebook.cells.append(nbformat.v4.new_markdown_cell(line, id="reference"))
    return notebook
