from tasks.core.shell import main
from tasks.data import stage

main(stage)
