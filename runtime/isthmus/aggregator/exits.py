"""Exit codes of the aggregator that its starter acts on."""

EXIT_PORT_TAKEN = 75  # EX_TEMPFAIL of <sysexits.h>
