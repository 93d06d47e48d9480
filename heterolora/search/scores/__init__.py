"""What a module or shortcut promises, measured before it is trained: a proxy a file.

`proxies` lists them; `gradients` sums what they are made of, `probe` is the adapter they score.
"""
