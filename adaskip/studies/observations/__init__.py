"""The paper's observations on any model: measured once, saved, then tested in numbers, tabulated and drawn.

Only `measuring` and `skip_check` run models; everything else reads what they saved.
"""
