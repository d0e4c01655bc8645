"""Integrations of v05 with existing trainers ("hosts"). No other part of v05 imports them.

Each host has its own modules, which extend the host through its public extension points. They import the host, and their docstrings
name the tested release. `groups` holds the code that hosts share; it imports no host.
"""
