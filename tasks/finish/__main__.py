from tasks.core.shell import main
from tasks.finish import stage

main(stage)
