"""Exit codes of the aggregator that the process which started it acts on."""

EXIT_PORT_TAKEN = 75  # EX_TEMPFAIL of <sysexits.h>
