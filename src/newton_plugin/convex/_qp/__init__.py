"""solve_qp and BPQPLayer: arguments in, solutions and their derivatives out."""
