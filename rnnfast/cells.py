"""The cells, one row each: all that the rest of the library needs to know about a cell but its math.

The math is written three times and only there: `backends/reference.py` (the definition), `backends/triton/cells.py`
and `csrc/cells.h`.
"""

from typing import Any, NamedTuple


class Cell(NamedTuple):
    """Sizes of a cell, each in multiples of the hidden size H.

    `gates`: rows of w_ih and w_hh. `tape`: values kept a row for the backward scan, in the order of `tape_names`.
    """

    name: str
    gates: int
    tape_names: tuple[str, ...]

    @property
    def tape(self) -> int:
        return len(self.tape_names)

    @property
    def has_cell_state(self) -> bool:
        return "cell_state" in self.tape_names


CELLS = {
    cell.name: cell
    for cell in (
        # The output alone gives the derivative of tanh and relu, so the plain RNN keeps nothing.
        Cell("rnn_tanh", 1, ()),
        Cell("rnn_relu", 1, ()),
        Cell("lstm", 4, ("input_gate", "forget_gate", "candidate", "output_gate", "cell_state")),
        Cell("gru", 3, ("reset_gate", "update_gate", "candidate", "recurrent_candidate")),
    )
}

# By the names that configurations give layers: the class, and the options that make it such a layer.
LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
}


def cell_named(layer: str) -> Cell:
    """The cell of a layer as configurations name it: "rnn" (tanh), "rnn_relu", "lstm" or "gru"."""
    return CELLS["rnn_tanh" if layer == "rnn" else layer]
