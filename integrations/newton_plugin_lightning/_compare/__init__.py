"""Trains a user's own module with and without Newton Losses, paired by seed, and says what the figures say.

The parts, each importing only those before it: ``errors``, ``statistics``, ``arms`` <- ``plan`` <- ``lines`` (the file
of finished runs). To train: ``tuning``, ``controls``, ``follow`` (callbacks), ``alone`` <- ``one_run`` <-
``fit_functions``, ``fit_config`` (where module and data come from) <- ``workers``, ``progress``. To tell:
``results`` <- ``verdict`` <- ``table``, ``picture``. ``comparison`` puts both together;
``command`` is the command line.
"""
