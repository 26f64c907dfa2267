from tasks.core.shell import main
from tasks.profile import stage

main(stage)
