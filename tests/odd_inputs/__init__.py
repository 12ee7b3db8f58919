"""Thousands of bad and odd inputs over the whole public face, each judged by itself.

A case is one public call with one odd thing in it. Whatever comes back is right (it equals an
oracle), refused (an error of ours that names the argument and says what to do) or marked (a status
or a NaN); anything else is a defect. ``python tests/odd_inputs`` runs all of it and prints a table;
``tests/library/test_odd_inputs.py`` runs a sample in the default suite and all of it in the slow
tier.
"""
