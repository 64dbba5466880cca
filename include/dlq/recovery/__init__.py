"""After a loss: a ledger made again from the archive, a source adopted, what is in doubt settled by people."""
