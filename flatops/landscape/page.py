"""The surfaces as a page to turn around, in a file that opens offline."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from plotly import graph_objects, subplots

from .plots import limits


def write(result: dict[str, Any], path: Path | str) -> None:
    """Write a page with one surface to turn for each network, on one scale of height and colour.

    Args:
        result: what landscape.json holds.
        path: HTML to write.
    """
    networks = result["networks"]
    low, high, log = limits([network["plane"] for network in networks])
    scaled = np.log10 if log else np.asarray
    figure = subplots.make_subplots(
        cols=len(networks),
        specs=[[{"type": "surface"}] * len(networks)],
        subplot_titles=[escape(network["name"]) for network in networks],
        horizontal_spacing=0.01,
    )
    hover = "loss %{z:.4g}<br>direction 1: %{x:.2f}<br>direction 2: %{y:.2f}<extra></extra>"
    for column, network in enumerate(networks, 1):
        across, along = network["plane"]["axes"]
        losses = np.array(network["plane"]["losses"], dtype=float).T
        losses[~np.isfinite(losses)] = np.nan  # holes
        figure.add_trace(
            graph_objects.Surface(
                x=across, y=along, z=losses, surfacecolor=scaled(losses), cmin=scaled(low), cmax=scaled(high),
                colorscale="Viridis", showscale=False, hovertemplate=hover,
            ),
            row=1, col=column,
        )  # fmt: skip
    height = {"title": "loss", "type": "log" if log else "linear", "range": [float(scaled(low)), float(scaled(high))]}
    figure.update_scenes(xaxis_title="direction 1", yaxis_title="direction 2", zaxis=height)
    figure.update_layout(title=escape(result["title"]), margin={"l": 0, "r": 0, "b": 0})
    figure.write_html(path, include_plotlyjs=True)
