"""The search that goes on while a model trains: ranked again, and what is off is parked.

`callback` is the way in; `export` saves what is in use, `masks` parks the rest, and the other files
serve these.
"""
