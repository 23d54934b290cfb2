"""An HTML page of surfaces that can be rotated, also offline."""

from __future__ import annotations

from html import escape
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from plotly import graph_objects, subplots

from .plots import COLUMNS, caption, limits, round_values

LEGEND = "height and colour: training loss; directions: relative to each filter's norm; drag one surface to rotate all"
HOVER = "loss %{z:.4g}<br>direction 1: %{x:.2f}<br>direction 2: %{y:.2f}<extra></extra>"
CAMERA = {"eye": {"x": 1.6, "y": 1.6, "z": 1.1}, "center": {"x": 0, "y": 0, "z": -0.15}}  # shows the whole box
LIGHT = {"ambient": 0.9, "diffuse": 0.3, "specular": 0, "fresnel": 0}  # colours show the loss: little shading
ROTATE_TOGETHER = """
const page = document.getElementById("{plot_id}");
const scenes = Object.keys(page._fullLayout).filter(name => /^scene\\d*$/.test(name));
page.on("plotly_relayout", change => {
  const [turned, ...others] = Object.keys(change).filter(name => name.endsWith(".camera"));
  if (turned && !others.length && scenes.length > 1)
    Plotly.relayout(page, Object.fromEntries(scenes.map(name => [name + ".camera", change[turned]])));
});
"""


def write(result: dict[str, Any], path: Path | str) -> None:
    """Write a page with a surface per network, on a common scale of height and colour; they rotate together.

    Args:
        result: the content of landscape.json.
        path: HTML to write.
    """
    networks = result["networks"]
    columns, rows = min(len(networks), COLUMNS), ceil(len(networks) / COLUMNS)
    low, high, log = limits([network["plane"] for network in networks])
    scaled = np.log10 if log else np.asarray
    figure = subplots.make_subplots(
        rows=rows,
        cols=columns,
        specs=[[{"type": "surface"}] * columns] * rows,
        subplot_titles=[escape(caption(network)) for network in networks],
        horizontal_spacing=0.01,
        vertical_spacing=0.1 / rows,
    )
    for number, network in enumerate(networks):
        across, along = network["plane"]["axes"]
        losses = np.array(network["plane"]["losses"], dtype=float).T
        losses[~np.isfinite(losses)] = np.nan  # holes
        figure.add_trace(
            graph_objects.Surface(
                x=across, y=along, z=losses, surfacecolor=scaled(losses), cmin=scaled(low), cmax=scaled(high),
                colorscale="Viridis", showscale=False, hovertemplate=HOVER, lighting=LIGHT,
            ),
            row=number // columns + 1, col=number % columns + 1,
        )  # fmt: skip
    height = {
        "title": "training loss",
        "type": "log" if log else "linear",
        "range": [float(scaled(low)), float(scaled(high))],
        "tickvals": round_values(low, high, log),
        "tickformat": "~g",
    }
    figure.update_scenes(xaxis_title="direction 1", yaxis_title="direction 2", zaxis=height, camera=CAMERA)
    figure.update_layout(title=f"{escape(result['title'])}<br><sup>{LEGEND}</sup>", margin={"l": 0, "r": 0, "b": 0})
    figure.write_html(path, include_plotlyjs=True, post_script=ROTATE_TOGETHER, default_height=f"{50 * max(2, rows)}vh")
