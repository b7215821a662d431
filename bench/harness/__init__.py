"""What the programs in bench/ share: the guest they measure, and the machine they run on.

Importing it needs nothing but Python, so that `harness.environment` can find the project's own interpreter
before anything else is imported.
"""
