"""What every program here needs: its command line, its processes, how it ends, files that a crash cannot spoil."""
