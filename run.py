"""Fine-tunes a model across clients: `python run.py --help`."""

import os

# Many small decompositions gain nothing from BLAS threads, and lose much to them on a busy machine.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from experiments.launch import main, reuse_programs

if __name__ == "__main__":
    reuse_programs()
    main()
