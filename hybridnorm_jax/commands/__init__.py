"""The program `hybridnorm`: one file for each of its subcommands, and main.py, which calls them.

A command reads its arguments, calls the library, prints. What it calls lives below; nothing imports a command but the
program's entries.
"""
