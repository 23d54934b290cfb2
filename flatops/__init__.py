from flatops import ops
from flatops.backend import backend
