"""v05 in the trainers people already run: one file a host, entered through the host's own door. Nothing in v05 imports them.

`groups` holds what the hosts share and needs none of them; the others import their host, and say which releases were tested.
"""
