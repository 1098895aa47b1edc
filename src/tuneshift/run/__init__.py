"""The spine of a run: its directory, its ledger, its manifest. Every result lands here before it is used."""
