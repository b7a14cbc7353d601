"""Fine-tunes a model across clients: `python run.py --help`."""

from experiments.launch import main

if __name__ == "__main__":
    main()
