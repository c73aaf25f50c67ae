"""Before torch is imported: threads that wait should sleep, for two ranks share two cores here."""
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
