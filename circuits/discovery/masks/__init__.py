"""Learned masks: one way of training them, over any units, with any distribution and penalty.

settings     what all methods that learn a mask have in common, and what is refused
penalty      what makes the mask small: a Lagrangian with a schedule, or a fixed price
training     the loop: a step's loss and gradient, the state
snapshots    the mask as it passed each size, and the ranking of edges that follows
checkpoint   the state on disk
warm_start   where a mask starts, by scores of another method
"""
