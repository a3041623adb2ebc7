"""Executed by a kernel before a chapter's first cell: a figure's text/plain form becomes its titles, axes and legends."""

from matplotlib.figure import Figure


def _describe(figure, printer, cycle):
    def words(texts):
        return "; ".join(dict.fromkeys(" ".join(text.split()) for text in texts if text.strip()))

    def axis_words(axis):
        x, y = axis.get_xlabel(), axis.get_ylabel()
        return f"{y} over {x}" if x and y else y or x

    axes = [axis for axis in figure.axes if axis.get_visible()]
    legends = [text.get_text() for axis in axes if axis.get_legend() for text in axis.get_legend().get_texts()]
    titles = [axis.get_title(where) for axis in axes for where in ("left", "center", "right")]
    parts = [words([figure.get_suptitle()]), words(titles), words(map(axis_words, axes)), words(legends)]
    printer.text(". ".join(part for part in parts if part))


# A printer registered with IPython would be dropped again when matplotlib's inline backend wakes up.
Figure._repr_pretty_ = _describe
