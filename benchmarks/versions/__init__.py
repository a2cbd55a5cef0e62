"""Does a changed package compute what the version before it computed? ``python -m benchmarks.versions``.

``write`` runs several thousand seeded cases with the ``newton_plugin`` that the interpreter finds and stores what they
give. ``compare`` sets two such files against each other. The cases use public names only, so that the same scripts run
under any version.
"""
