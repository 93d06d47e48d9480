"""Tables, plots and pages made from result files alone.

Nothing here measures anything.
"""
