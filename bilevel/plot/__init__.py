"""Pictures of runs and hyperparameters, one function each (extra ``plot``: matplotlib).

Every function returns a matplotlib figure: ``figure.savefig("name.png")``. Matplotlib is
imported when the first picture is drawn.
"""

from bilevel.plot.arrays import example_weights as example_weights
from bilevel.plot.arrays import layer_map as layer_map
from bilevel.plot.arrays import pixel_map as pixel_map
from bilevel.plot.costs import resource_bars as resource_bars
from bilevel.plot.costs import response_surface as response_surface
from bilevel.plot.runs import cost_curves as cost_curves
from bilevel.plot.runs import trajectories as trajectories
from bilevel.plot.runs import trust_strip as trust_strip
