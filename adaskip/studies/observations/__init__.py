"""The paper's observations on any model: measured and saved, then tested, tabulated and drawn.

Only `measuring` and `importance_check` run models; everything else reads what they saved.
"""
